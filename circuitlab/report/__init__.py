"""Reports: what is known of a circuit, as one folder for people and programs."""
