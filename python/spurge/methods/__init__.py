"""The methods, a room each; the module with the room's name reads like its algorithm."""
