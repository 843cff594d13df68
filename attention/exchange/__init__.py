"""How queries meet the KV that other cp ranks hold: what all of them know of a step, the choice, and the strategies."""
