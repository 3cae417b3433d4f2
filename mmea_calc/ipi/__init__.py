"""A force engine for i-PI: `client.serve` over the connections, `protocol` as bytes in, bytes out."""
