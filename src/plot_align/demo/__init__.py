"""The demo's preference data: harmful requests, benign twins and everyday requests, with answers sorted into pairs."""
