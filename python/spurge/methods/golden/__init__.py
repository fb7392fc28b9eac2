"""Golden words: from files, lexicons, corpora, or the answers of a language model."""
