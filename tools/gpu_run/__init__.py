"""What `make gpu` runs: stages that share one deadline and leave what they found behind, whenever they are stopped."""
