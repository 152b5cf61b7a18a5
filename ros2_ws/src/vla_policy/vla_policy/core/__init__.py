"""What every part shares and the robot needs: preprocessing, prompt, actions, engines, contract. No rclpy, no torch."""
