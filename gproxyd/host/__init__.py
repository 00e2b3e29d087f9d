"""What the daemon meets on its machine that is not a client: at present the embedded scripted vendor."""
