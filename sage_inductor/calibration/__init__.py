"""How a plan is made: samples run through the model, each precision measured at each site, decisions within a tolerance."""
