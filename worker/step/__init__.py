"""One step on one rank: from the plan to its rows, through the model, to drawn tokens and those who embed them."""
