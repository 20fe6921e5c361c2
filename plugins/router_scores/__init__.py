"""`dlo::RouterScores`: what a router gives every token, in one launch."""
