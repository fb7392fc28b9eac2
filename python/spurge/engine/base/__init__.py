"""Files, checks, memory, ranks and statistics: what knows no model."""
