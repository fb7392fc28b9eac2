"""Files, checks, memory, ranks and statistics: nothing here sees a model."""
