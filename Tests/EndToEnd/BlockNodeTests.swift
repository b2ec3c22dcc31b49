// A block node as the source: a loop device, which only root can make.
import CLinux
import Glibc
import Testing

/// Runs a body with a loop device over a file, one at a time on this machine: who looks for a free device may briefly
/// claim one that was just given away. Other tests lock the same node.
private func withLoopDevice(_ file: String, _ body: (String) throws -> Void) throws {
    let control = dg_open("/dev/loop-control", O_RDWR | O_CLOEXEC, 0)
    guard control >= 0, flock(control, LOCK_EX) == 0 else { throw Trouble("locking /dev/loop-control: error \(errno)") }
    defer { close(control) }
    let node = try run("losetup", "--find", "--show", file).lines[0]
    defer { _ = try? run("losetup", "--detach", node) }
    try body(node)
}

@Suite(.enabled(if: getuid() == 0, "a loop device needs root")) struct BlockNodeTests {
    @Test(arguments: ["", "?direct=true", "?exclusive=true"]) func `a node is served like its file`(_ options: String)
        throws
    {
        let folder = try Folder()
        let image = try folder.image("disk")
        try withLoopDevice(image) { (node) throws in
            try serving(["file:\(node)\(options)"], in: folder) { (gateway) throws in
                try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), image)
                #expect(try run("nbdinfo", "--size", gateway.uri()).lines == ["\(24 << 20)"])
            }
            #expect(try run("diskgate", "checksum", node).text.prefix(64) == checksum(image)[...])
        }
    }

    @Test func `a node is written through`() throws {
        let folder = try Folder()
        let image = try folder.image("disk")
        let target = try folder.filled("target")
        try withLoopDevice(target) { (node) throws in
            try serving(["--writable", node], in: folder) { (gateway) throws in
                try run("nbdcopy", "--flush", image, gateway.uri())
                try run("qemu-img", "compare", "-f", "raw", "-F", "raw", gateway.uri(), image)
            }
        }
        #expect(try isSame(image, target))
    }
}
