"""How weights change: optimizers and their groups, the learning rate, the average of weights, the guard of steps."""
