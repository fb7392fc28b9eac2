"""Everything on fixed features: fits, associations, rates."""
