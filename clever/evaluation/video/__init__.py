"""Video: files of DAVIS, label propagation, segmentation, J&F, and reading and writing of video files."""
