// Waiting between two looks at a hypervisor.
import Glibc

/// Waits.
func pause(seconds: Double) {
    usleep(UInt32(seconds * 1e6))
}
