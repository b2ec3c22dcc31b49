// Harm done to conversations at every point of the protocol, in clear text and over TLS: clients are never told wrong
// data, and the server serves on with nothing left behind.
import Glibc
import Testing

@Suite(.serialized) struct FaultCampaignTests {
    /// Cases of a thousand; all of them where DISKGATE_FAULTS=1000 asks for it.
    private static let share = getenv("DISKGATE_FAULTS").map { String(cString: $0) } ?? "200"
    /// Images that clients write, one each.
    private static let targetCount = 250

    /// What a process must not collect.
    private struct Footprint {
        var threads: Int
        var descriptors: Int
        /// The most memory it ever had, in KiB.
        var peakKiB: Int

        init(of gateway: Gateway) throws {
            let status = try run("cat", "/proc/\(gateway.pid)/status").text
            func number(_ key: String) -> Int? {
                status.split(separator: "\n").first { $0.hasPrefix(key) }.flatMap { Int($0.filter(\.isNumber)) }
            }
            guard let threads = number("Threads:"), let peak = number("VmHWM:") else {
                throw Trouble("reading what the server uses: \(status)")
            }
            self.threads = threads
            peakKiB = peak
            descriptors = try run("ls", "/proc/\(gateway.pid)/fd").lines.count
        }
    }

    @Test(arguments: [("plain", [String]()), ("x509", ["--tls-certificates"]), ("psk", ["--tls-psk"])])
    func `a connection that breaks, or is tampered with, at any point`(way: String, option: [String]) throws {
        let folder = try Folder()
        let made = try Certificates.made()
        let values = ["plain": [], "x509": [made["server"]], "psk": [made.psk()]][way] ?? []
        // Nine requests of nbdcopy and a part of one.
        let size = 601 << 10
        let image = try folder.image("image", size: size)
        try run("mkdir", folder.file("targets"))
        var targets: [String] = []
        for number in 0..<Self.targetCount {
            targets += ["--name", "w\(number)", try folder.filled("targets/w\(number)", size: size)]
        }
        let listen = ["--listen", "tcp://127.0.0.1:0", "--control"]
        let reader = try Gateway(
            option + values + listen + ["unix:\(folder.file("reader"))", "--name", "disk", image], in: folder)
        let writer = try Gateway(
            option + values + listen + ["unix:\(folder.file("writer"))", "--writable"] + targets, in: folder)
        let before = try [reader, writer].map { try Footprint(of: $0) }
        let outcome = try Tool("python3").run([
            "\(pythonPath)/campaign.py", Tool.diskgate.path, way, try #require(reader.port), try #require(writer.port),
            image,
            made["client"], made.psk(), folder.file("targets"), Self.share,
        ])
        #expect(outcome.status == 0, "\(outcome.text)\(outcome.errors)")
        for (index, gateway) in [reader, writer].enumerated() {
            let control = ["--control", "unix:\(folder.file(index == 0 ? "reader" : "writer"))"]
            #expect(try eventually { try Tool.diskgate.run(["clients"] + control).lines.isEmpty })
            let isTidy = try eventually {
                let now = try Footprint(of: gateway)
                return now.threads <= before[index].threads + 2 && now.descriptors <= before[index].descriptors
            }
            let after = try Footprint(of: gateway)
            #expect(isTidy, "\(after) after \(before[index])")
            // 16 clients at a time, with a handful of 64 KiB requests each.
            #expect(isSanitized || after.peakKiB < before[index].peakKiB + (96 << 10))
        }
        let access = way == "plain" ? Access.plain : way == "x509" ? .certificate("client") : .key("backup")
        let copy = try folder.filled("copy", size: size)
        try run("nbdcopy", access.uri(port: try #require(reader.port), export: "disk"), copy)
        #expect(try isSame(image, copy))
        try run("nbdcopy", "--flush", copy, access.uri(port: try #require(writer.port), export: "w0"))
        #expect(try isSame(image, folder.file("targets/w0")))
        #expect(try reader.stop() == 0)
        #expect(try writer.stop() == 0)
    }
}
