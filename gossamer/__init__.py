"""gossamer makes neural networks sparse, and makes it pay: in size, memory and seconds, at a quality you can see."""
