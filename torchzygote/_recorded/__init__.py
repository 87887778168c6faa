"""What the recorded graph tells of structure: axes that stay apart, affine parts, layers."""
