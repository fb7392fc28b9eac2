"""Localisation: scores of all neurons of a model beside the peers', their errors, time, memory and plans."""
