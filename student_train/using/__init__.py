"""A finished student: sampling, likelihoods. No part of training."""
