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
        // One at a time on this machine: who looks for a free device may briefly claim one that was just given away.
        let control = try Descriptor.open("/dev/loop-control", O_RDWR)
        try require(flock(control.number, LOCK_EX) == 0, "locking /dev/loop-control: \(systemErrorText(errno))")
        defer { flock(control.number, LOCK_UN) }
        return try withTemporaryDirectory { directory in
            let file = try directory.makeFile("disk", content)
            let node = try attach(file, sectorSize: sectorSize)
            defer { detach(node) }
            return try body(node, file)
        }
    }

    /// Makes a loop device over a file.
    public static func attach(_ file: String, sectorSize: Int) throws -> String {
        let node = try Tool.output("losetup", ["--find", "--show", "--sector-size", "\(sectorSize)", file])
        // A node's read-only switch (BLKROSET) outlives what was behind it.
        _ = try Tool.output("blockdev", ["--setrw", node])
        return node
    }

    /// Gives a loop device back, writable as it was.
    public static func detach(_ node: String) {
        _ = try? Tool.run("blockdev", ["--setrw", node])
        _ = try? Tool.run("losetup", ["--detach", node])
    }
}
