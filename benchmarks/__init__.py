"""What a run costs: planned here without the machine that it is for."""
