// Datastores on block nodes, opened as a proxy opens LUNs: with O_DIRECT, and with sectors of 512 and 4096 bytes.
import Block
import Formats
import LinuxIO
import Support
import Testing

@Suite(.serialized, .enabled(if: LoopDevice.areAvailable, Comment(rawValue: LoopDevice.reason)))
struct VMFSLoopTests {
    /// Runs a body with nodes over the LUNs of an image.
    private func withNodes(_ image: VMFSImage, sectorSize: Int, _ body: ([any BlockDevice]) throws -> Void) throws {
        // The turn that loop devices are made in is taken by one device that is not used.
        try LoopDevice.with([1]) { _, _ in
            var nodes: [String] = []
            defer { for node in nodes { LoopDevice.detach(node) } }
            for path in image.paths { nodes.append(try LoopDevice.attach(path, sectorSize: sectorSize)) }
            var options = RawOptions()
            options.isDirect = true
            try body(nodes.map { try BlockNodeDevice.open($0, options) })
        }
    }

    @Test(arguments: [3, 5, 6], [512, 4096])
    func everyFileIsReadFromANode(version: Int, sectorSize: Int) throws {
        let image = try VMFSImage.make(version, "--sector", "\(sectorSize)")
        try withNodes(image, sectorSize: sectorSize) { luns in
            let volume = try openVolume(luns)
            for (path, expected) in image.manifest.files {
                let file = try volume.open(path)
                try checkFile(file, expected, luns, path)
                try file.recheck(.everything)
            }
        }
    }

    @Test(arguments: [5, 6])
    func spanOfNodesIsReadInAnyOrder(version: Int) throws {
        let image = try VMFSImage.make(version, "--luns", "3")
        try withNodes(image, sectorSize: 4096) { luns in
            let volume = try openVolume([luns[1], luns[2], luns[0]])
            for (path, expected) in image.manifest.files {
                try checkFile(try volume.open(path), expected, luns, path)
            }
        }
    }

    @Test func partitionOfANodeIsRead() throws {
        let image = try VMFSImage.make(6, "--mbr", "--sector", "4096")
        try withNodes(image, sectorSize: 4096) { luns in
            let volume = try openVolume(luns)
            for (path, expected) in image.manifest.files {
                try checkFile(try volume.open(path), expected, luns, path)
            }
        }
    }
}
