// Hot-adding to a proxy that is a QEMU machine, over the QMP monitor of that machine.
import Block
import Glibc
import LinuxIO
import Transports

/// Adds SCSI disks to a QEMU machine.
final class QEMUHotAdd: HotAddController {
    /// A SCSI adapter of the machine.
    private struct Adapter {
        let id: String
        let targets: Range<Int>
        var used: Set<Int> = []

        /// The next free target. 7 is the adapter's own on a parallel SCSI bus, and stays free.
        var free: Int? { targets.first { $0 != 7 && !used.contains($0) } }
        var freeCount: Int { targets.count - 1 - used.filter { $0 != 7 }.count }
    }

    /// Adapters that take disks, and their targets.
    private static let kinds = ["child<pvscsi>": 0..<64, "child<virtio-scsi-pci>": 0..<256]
    private static let diskKinds = ["child<scsi-hd>", "child<scsi-cd>", "child<scsi-block>", "child<scsi-generic>"]
    private static let places = ["/machine/peripheral", "/machine/peripheral-anon"]
    /// What the ids of our disks begin with.
    private static let prefix = "dg-"
    /// Seconds that QEMU and the proxy's kernel may take to let go of a disk.
    private static let detachSeconds = 30.0

    let name: String
    private let monitor: ServerAddress

    /// A controller by its URI: `qmp+unix:PATH` or `qmp+tcp:HOST:PORT` of the proxy's own machine.
    ///
    /// - Throws: `.invalid` for a malformed URI, `.unsupported` for another hypervisor.
    init(_ text: String) throws(BlockError) {
        let uri = try MachineURI(text)
        name = text
        try uri.allow([])
        switch uri.scheme {
        case "qmp+unix":
            try uri.requireAbsolute(uri.body, "the monitor's path")
            guard (2...107).contains(uri.body.utf8.count) else { throw uri.bad("its path has more than 107 bytes") }
            monitor = .unix(path: uri.body)
        case "qmp+tcp":
            guard let (host, port) = hostAndPort(uri.body) else { throw uri.bad("give HOST:PORT of the monitor") }
            monitor = .tcp(host: host, port: port)
        default:
            throw BlockError(
                .unsupported,
                "opening the hot-add controller \(text): only QEMU's monitors add disks in this version of diskgate "
                    + "(qmp+unix:PATH, qmp+tcp:HOST:PORT)")
        }
    }

    /// Runs a body with the monitor, which others can have again afterwards.
    private func withMonitor<R>(_ body: (QMPClient) throws(BlockError) -> R) throws(BlockError) -> R {
        let client = try QMPClient.connect(to: monitor)
        defer { client.close() }
        return try body(client)
    }

    func freeSlots() throws(BlockError) -> Int {
        try withMonitor { (monitor) throws(BlockError) in
            try Self.adapters(monitor).reduce(0) { $0 + $1.freeCount }
        }
    }

    func list() throws(BlockError) -> [HotAddedDevice] {
        try withMonitor { (monitor) throws(BlockError) in
            try Self.disks(monitor).filter { $0.id.hasPrefix(Self.prefix) }
        }
    }

    func attach(_ requests: [HotAddRequest]) throws(BlockError) -> [HotAddedDevice] {
        try withMonitor { (monitor) throws(BlockError) in
            var adapters = try Self.adapters(monitor)
            let free = adapters.reduce(0) { $0 + $1.freeCount }
            guard free >= requests.count else {
                throw BlockError(
                    .noSpace,
                    "adding \(requests.count) disks to \(name): its SCSI adapters (\(adapters.count) that have an id) "
                        + "have only \(free) places free")
            }
            var added: [HotAddedDevice] = []
            do throws(BlockError) {
                for request in requests {
                    guard let index = adapters.indices.first(where: { adapters[$0].free != nil }),
                        let target = adapters[index].free
                    else { break }
                    adapters[index].used.insert(target)
                    added.append(try Self.add(request, to: adapters[index].id, target: target, monitor))
                }
            } catch {
                for device in added { try? Self.remove(device.id, monitor) }
                throw error
            }
            return added
        }
    }

    func detach(_ ids: [String]) throws(BlockError) {
        try withMonitor { (monitor) throws(BlockError) in
            var failure: BlockError?
            for id in ids {
                do throws(BlockError) { try Self.remove(id, monitor) } catch { failure = failure ?? error }
            }
            if let failure { throw failure }
        }
    }

    // MARK: - One disk

    private static func add(
        _ request: HotAddRequest, to adapter: String, target: Int, _ monitor: QMPClient
    ) throws(BlockError) -> HotAddedDevice {
        let doing = "adding \(request.image) to \(monitor.name)"
        guard request.id.hasPrefix(prefix), request.id.utf8.count <= 31 else {
            throw BlockError(.invalid, "\(doing): the id \(request.id) is none of diskgate's")
        }
        do throws(BlockError) {
            try monitor.execute(
                "blockdev-add",
                [
                    "driver": .text(request.format), "node-name": .text(request.id),
                    "read-only": .bool(!request.isWritable), "discard": "unmap",
                    "file": ["driver": "file", "filename": .text(request.image)],
                ])
            do throws(BlockError) {
                try monitor.execute(
                    "device_add",
                    [
                        "driver": "scsi-hd", "id": .text(request.id), "bus": .text("\(adapter).0"),
                        "scsi-id": .integer(Int64(target)), "lun": 0, "drive": .text(request.id),
                        "serial": .text(request.serial),
                    ])
            } catch {
                _ = try? monitor.execute("blockdev-del", ["node-name": .text(request.id)])
                throw error
            }
        } catch { throw error.during(doing) }
        return HotAddedDevice(id: request.id, serial: request.serial, controller: adapter, target: target, unit: 0)
    }

    private static func remove(_ id: String, _ monitor: QMPClient) throws(BlockError) {
        let doing = "taking \(id) off \(monitor.name)"
        guard id.hasPrefix(prefix) else { throw BlockError(.denied, "\(doing): diskgate has not added it") }
        let end = monotonicSeconds() + detachSeconds
        switch try monitor.attempt("device_del", ["id": .text(id)]) {
        case .success: break
        case .failure(let refusal):
            // It may be on its way already, or gone.
            let isKnown = refusal.kind == "DeviceNotFound" || refusal.description.contains("in the process of unplug")
            if !isKnown { throw BlockError(.invalid, "\(doing): \(refusal.description)") }
        }
        while try disks(monitor).contains(where: { $0.id == id }) {
            if monotonicSeconds() > end {
                throw BlockError(
                    .inputOutput, "\(doing): the machine does not let go of it within \(Int(detachSeconds)) s")
            }
            usleep(20_000)
        }
        while true {
            switch try monitor.attempt("blockdev-del", ["node-name": .text(id)]) {
            case .success: return
            case .failure(let refusal):
                if refusal.description.contains("find node") || refusal.kind == "DeviceNotFound" { return }
                if monotonicSeconds() > end { throw BlockError(.invalid, "\(doing): \(refusal.description)") }
                usleep(50_000)
            }
        }
    }

    // MARK: - What is there

    private static func children(_ monitor: QMPClient) throws(BlockError) -> [(path: String, kind: String)] {
        var found: [(path: String, kind: String)] = []
        for place in places {
            let answer = try monitor.execute("qom-list", ["path": .text(place)])
            for child in answer.elements {
                if let name = child["name"]?.string, let kind = child["type"]?.string {
                    found.append(("\(place)/\(name)", kind))
                }
            }
        }
        return found
    }

    private static func property(_ name: String, of path: String, _ monitor: QMPClient) throws(BlockError)
        -> JSONValue?
    {
        switch try monitor.attempt("qom-get", ["path": .text(path), "property": .text(name)]) {
        case .success(let value): value
        case .failure: nil  // It is on its way out, or has no such property.
        }
    }

    /// All SCSI disks, whoever has added them.
    private static func disks(_ monitor: QMPClient) throws(BlockError) -> [HotAddedDevice] {
        var found: [HotAddedDevice] = []
        for (path, kind) in try children(monitor) where diskKinds.contains(kind) {
            let bus = try property("parent_bus", of: path, monitor)?.string ?? ""
            // The bus is below its adapter: .../pvscsi0/pvscsi0.0, with a device between them for virtio.
            let adapter = bus.split(separator: "/").last.map { $0.prefix { $0 != "." } } ?? ""
            let target = try property("scsi-id", of: path, monitor)?.whole ?? 0
            let unit = try property("lun", of: path, monitor)?.whole ?? 0
            found.append(
                HotAddedDevice(
                    id: path.split(separator: "/").last.map(String.init) ?? "",
                    serial: try property("serial", of: path, monitor)?.string ?? "", controller: String(adapter),
                    target: Int(clamping: target), unit: Int(clamping: unit)))
        }
        return found
    }

    private static func adapters(_ monitor: QMPClient) throws(BlockError) -> [Adapter] {
        var adapters: [Adapter] = []
        for (path, kind) in try children(monitor) {
            // Buses of adapters without an id have names that do not tell which is whose.
            guard let targets = kinds[kind], path.hasPrefix("\(places[0])/"), let id = path.split(separator: "/").last
            else { continue }
            adapters.append(Adapter(id: String(id), targets: targets))
        }
        for disk in try disks(monitor) {
            if let index = adapters.firstIndex(where: { $0.id == disk.controller }) {
                adapters[index].used.insert(disk.target)
            }
        }
        return adapters.sorted { $0.id < $1.id }
    }
}
