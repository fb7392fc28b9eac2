// A program without Python: opens the rows of three nodes, and sums them back with weights.
#include <spurge/gate.hpp>
#include <spurge/ig.hpp>

#include <cstdio>
#include <stdexcept>
#include <vector>

int main() {
  const std::vector<float> x{1, 2, 3, 4}, u{4, 3, 2, 1};
  const double alphas[] = {0.0, 0.5, 1.0}, weights[] = {1.0, 2.0, 3.0};
  std::vector<float> rows(12), sum(4);
  spurge::gate::open_rows_cpu(rows.data(), x.data(), u.data(), alphas, 3, 4, spurge::DType::f32, 1);
  spurge::ig::node_sum_cpu(sum.data(), rows.data(), weights, 3, 4, spurge::DType::f32, 1);
  for (float s : sum) std::printf("%g ", s);
  try {
    const std::int64_t column = 9;
    const float gate = 0;
    spurge::gate::gate_columns_cpu(rows.data(), &column, &gate, 1, 3, 4, 1, spurge::DType::f32, 1);
  } catch (const std::invalid_argument& e) {
    std::printf("| %s\n", e.what());
  }
}
