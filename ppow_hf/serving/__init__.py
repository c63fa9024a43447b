"""Meeting points with serving engines: our window rule inside vLLM, and a vLLM to measure drafters in."""
