"""What several evaluations share: the pretrained network, its features and parts, k-NN, the probe."""
