// VMDKs in local directories whose files are replaced under their names while they are read, as hosts do it.
import Block
import Glibc
import LinuxIO
import Support
import Testing
import Transports

@Suite(.enabled(if: Tool.exists("qemu-img"), "needs qemu-utils")) struct VMDKReplacedTests {
    /// A disk in a flat file with a descriptor beside it.
    private func flatDisk(_ directory: TemporaryDirectory) throws -> (path: String, text: String) {
        let path = directory.file("disk.vmdk")
        _ = try Tool.output("qemu-img", ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", path, "1M"])
        return (path, String(decoding: try contentOfFile(path), as: UTF8.self))
    }

    /// Puts another file where one of this name is.
    private func replace(_ path: String, _ text: String, in directory: TemporaryDirectory) throws {
        let new = try directory.makeFile("new", Array(text.utf8))
        try require(rename(new, path) == 0, "renaming \(new): \(systemErrorText(errno))")
    }

    /// The text with another content id.
    private func changed(_ text: String) throws -> String {
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        let result = lines.map { $0.hasPrefix("CID=") ? "CID=12345678" : String($0) }.joined(separator: "\n")
        try require(result != text, "no content id in \(text)")
        return result
    }

    @Test func anotherDescriptorUnderTheNameIsNoticed() throws {
        try withTemporaryDirectory { directory in
            let (path, text) = try flatDisk(directory)
            // The same again, and what hosts write while a machine runs.
            let device = try SourceReference(path).open()
            try device.confirm()
            try replace(path, text, in: directory)
            try device.confirm()
            try replace(path, "\(text)ddb.toolsVersion = \"12352\"\n", in: directory)
            try device.confirm()
            try replace(path, try changed(text), in: directory)
            try requireError(.changed, "another content id") { try device.confirm() }
            // What is opened now is that.
            try SourceReference(path).open().confirm()
            try replace(path, "nothing", in: directory)
            try requireError(.changed, "no descriptor") { try device.confirm() }
            unlink(path)
            try requireError(.changed, "no file") { try device.confirm() }
            mkdir(path, 0o700)
            try requireError(.changed, "a directory") { try device.confirm() }
        }
    }

    @Test func aReplacedParentIsNoticed() throws {
        try withTemporaryDirectory { directory in
            let (base, top) = (directory.file("base.vmdk"), directory.file("top.vmdk"))
            _ = try Tool.output("qemu-img", ["create", "-q", "-f", "vmdk", base, "8M"])
            _ = try Tool.output("qemu-img", ["create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", top])
            let device = try SourceReference(top).open()
            try device.confirm()
            let copy = directory.file("copy.vmdk")
            _ = try Tool.output("cp", [base, copy])
            _ = try Tool.output("qemu-io", ["-f", "vmdk", "-c", "write -P 5 1M 64k", copy])
            try device.confirm()
            try require(rename(copy, base) == 0)
            try requireError(.changed, "another parent") { try device.confirm() }
        }
    }

    @Test func aLinkThatLeadsOutOfTheDirectoryIsNotFollowed() throws {
        try withTemporaryDirectory { directory in
            let place = directory.file("vm")
            try makeDirectories(place)
            let (base, top) = ("\(place)/base.vmdk", "\(place)/top.vmdk")
            _ = try Tool.output("qemu-img", ["create", "-q", "-f", "vmdk", base, "8M"])
            _ = try Tool.output("qemu-img", ["create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", top])
            let device = try SourceReference(top).open()
            // The same disk, but where nobody has allowed to look.
            let outside = directory.file("outside.vmdk")
            try require(rename(base, outside) == 0 && symlink(outside, base) == 0)
            try requireError(.denied, "a link") { try device.confirm() }
        }
    }
}
