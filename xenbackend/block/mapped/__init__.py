"""What image formats have in common whose disk lies in a file in clusters, wherever there was room for them."""
