"""`preftune ui`: a page to look at a run, to talk with its policies and to vote on their replies."""
