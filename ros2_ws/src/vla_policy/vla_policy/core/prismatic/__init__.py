"""What policies on a Prismatic model share: two fused vision towers, a Llama decoder, OpenVLA's prompt and codecs."""
