// Loop devices: real block nodes over files, for those who may make them.
import Block
import Glibc
import LinuxIO

/// Loop devices.
public enum LoopDevice {
    /// Whether they can be made here: root, losetup and the control node.
    public static let areAvailable =
        Tool.isRoot && Tool.exists("losetup") && access("/dev/loop-control", R_OK | W_OK) == 0

    /// Why tests that need them are skipped.
    public static let reason = "needs root, losetup and /dev/loop-control"

    /// Runs a body with the path of a loop device over a new file that is filled with `content`.
    ///
    /// - Parameter body: gets the node's path and the file's.
    public static func with<R>(
        _ content: [UInt8], sectorSize: Int = 512, _ body: (_ node: String, _ file: String) throws -> R
    ) throws -> R {
        try withTemporaryDirectory { directory in
            let file = try directory.makeFile("disk", content)
            let node = try Tool.output("losetup", ["--find", "--show", "--sector-size", "\(sectorSize)", file])
            defer { _ = try? Tool.run("losetup", ["--detach", node]) }
            return try body(node, file)
        }
    }
}
