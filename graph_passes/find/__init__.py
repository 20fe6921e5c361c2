"""Reading graphs by structure: data flow, the residual stream, decoder layers, their weights."""
