"""The demos: a real pretrained model in, a smaller and faster one out, everything measured in that run."""
