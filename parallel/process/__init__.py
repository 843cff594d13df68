"""What every process of Muster needs whatever it does: its code, its cores, its log, addresses, and bad bytes."""
