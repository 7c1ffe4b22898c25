"""Images: files, tar files, views and data sets."""
