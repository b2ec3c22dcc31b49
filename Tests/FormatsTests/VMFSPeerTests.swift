// Other readers of VMFS on the images that these tests are made with: what we compare with is not our own idea alone.
import Foundation
import Support
import Testing

/// Debian's vmfs-tools and vmfs6-tools, where they are right: the latter takes an address of zero for a file's end, and
/// returns what is on the LUN for blocks that were never written; both know no large files.
@Suite struct VMFSPeerTests {
    private func check(_ image: VMFSImage, _ tool: String, skippedLines: Int, without: Set<String> = []) throws {
        let files = image.manifest.files.filter { $0.value.sha256 != nil && !without.contains($0.key) }
        #expect(files.count > 25)
        let script = """
            tool=$1 skip=$2; shift 2; luns=; while [ "$1" != -- ]; do luns="$luns $1"; shift; done; shift
            for file; do "$tool" $luns cat "/$file" 2>/dev/null | tail -n +"$skip" | sha256sum | cut -d' ' -f1; done
            """
        guard let path = Support.Tool.path(of: tool) else {
            throw CheckFailure("\(tool) is not installed; on Debian: apt-get install vmfs-tools vmfs6-tools")
        }
        let paths = files.keys.sorted()
        let sums = try Support.Tool.output(
            "sh", ["-c", script, "sh", path, "\(skippedLines + 1)"] + image.paths + ["--"] + paths)
        for (path, sum) in zip(paths, sums.split(separator: "\n")) {
            #expect(String(sum) == files[path]?.sha256, "\(tool) reads \(path) differently")
        }
    }

    @Test(arguments: [3, 5], [[], ["--luns", "3"]])
    func otherReaderAgreesOnVMFS3And5(version: Int, options: [String]) throws {
        try check(options.isEmpty ? .make(version) : .make(version, "--luns", "3"), "debugvmfs", skippedLines: 0)
    }

    @Test func otherReaderAgreesOnVMFS6() throws {
        let without: Set = ["vm1/thin-flat.vmdk", "vm1/lazy-flat.vmdk", "vm1/odd-flat.vmdk"]
        try check(.make(6), "debugvmfs6", skippedLines: 1, without: without)
        try check(.make(6, "--luns", "3"), "debugvmfs6", skippedLines: 3, without: without)
    }
}
