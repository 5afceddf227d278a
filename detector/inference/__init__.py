"""From images to detections: post-processing, NMS, the detector and the predictor."""
