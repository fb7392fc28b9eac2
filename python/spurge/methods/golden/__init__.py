"""Golden words: from files, lexicons, corpora, or a language model that is asked."""
