"""Reward terms: pure vectorised functions of a RewardBatch, f32[B] out, on device."""
