#pragma once
// Every user mistake leaves C++ as std::invalid_argument (-> ValueError) with a sentence in it.
#include <sstream>
#include <stdexcept>

namespace spurge {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace spurge

#define SPURGE_CHECK(condition, ...)              \
  do {                                            \
    if (!(condition)) ::spurge::fail(__VA_ARGS__); \
  } while (0)
