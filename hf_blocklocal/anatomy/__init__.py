"""What there is to know of any model: where its layers are, what they are given and return, which weights it ties."""
