"""Products with the Jacobian of a step, and penalties on it; takes callables, knows no model."""
