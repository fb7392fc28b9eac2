"""FCR: the single weight that ties a feature to a class, and its edit."""
