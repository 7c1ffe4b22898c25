"""Video object segmentation: files of DAVIS, propagation of masks, J&F."""
