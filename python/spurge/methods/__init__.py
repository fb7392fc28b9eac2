"""The methods, one file each; every file reads like its algorithm."""
