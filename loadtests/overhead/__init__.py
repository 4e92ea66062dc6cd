"""What a gateway adds to the time and cost of a request: ours and others in front of the same mock engine."""
