"""What the methods share, in rooms; each says in one line what it is about."""
