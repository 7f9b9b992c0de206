"""`report`: what a run, a comparison or a score file found, as one page for people and one JSON file for programs."""
