"""The demo: a small model learns a planted shortcut and is cured of it."""
