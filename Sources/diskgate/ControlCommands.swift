// `diskgate exports` and `diskgate clients`: a running server's control socket on the command line.
import ArgumentParser
import Gateway
import Glibc
import Transports

struct ExportsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "exports", abstract: "List, add and remove the exports of a running server.",
        subcommands: [List.self, Add.self, Remove.self], defaultSubcommand: List.self)

    struct List: ParsableCommand {
        static let configuration = CommandConfiguration(abstract: "List the exports.")
        @OptionGroup var server: ControlArguments
        @OptionGroup var report: ReportArguments

        func run() throws {
            let exports = try server.send(ControlRequest(command: "exports")).exports ?? []
            if report.json { return try printJSON(exports) }
            for export in exports {
                let access = export.readOnly ? "read-only" : "writable"
                print(
                    "\"\(export.name)\" \(export.source) \(export.format) \(export.size) bytes \(access) "
                        + "\(export.clients) clients, \(export.bytesRead) bytes read, \(export.bytesWritten) written, "
                        + "\(export.errors) errors, \(export.inFlight) in flight")
            }
        }
    }

    struct Add: ParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Add an export.")
        @Argument(help: "A path or a URI of a disk.") var source: String
        @Option(help: "Name of the export.") var name: String
        @Option(help: "Text about the export for people.") var description = ""
        @Flag(help: "Let clients write to the source.") var writable = false
        @Flag(help: "Let clients write to scratch space over the source.") var overlay = false
        @Option(help: "Take this partition.") var partition: Int?
        @Option(help: ArgumentHelp("Leave out this many bytes at the start.", valueName: "bytes"))
        var offset: ByteArgument?
        @Option(help: ArgumentHelp("Take only this many bytes.", valueName: "bytes")) var length: ByteArgument?
        @Option(help: ArgumentHelp("Admit these clients, instead of those that the server admits.", valueName: "rule"))
        var allow: [String] = []
        @OptionGroup var server: ControlArguments

        func validate() throws {
            if writable && overlay { throw ValidationError("--writable and --overlay exclude each other.") }
        }

        /// A path as the server finds it; a URI as it is.
        private func absolute(_ source: String) -> String {
            guard let reference = try? SourceReference(source), case .path(let path) = reference.kind, path == source,
                !path.hasPrefix("/"), let directory = getcwd(nil, 0)
            else { return source }
            defer { free(directory) }
            return "\(String(cString: directory))/\(path)"
        }

        func run() throws {
            var request = ControlRequest(command: "add")
            // The server has another working directory.
            request.source = absolute(source)
            request.name = name
            request.description = description
            request.access = writable ? "writable" : overlay ? "overlay" : "read-only"
            request.partition = partition
            request.offset = offset?.bytes
            request.length = length?.bytes
            if !allow.isEmpty { request.allow = allow }
            _ = try server.send(request)
        }
    }

    struct Remove: ParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Remove an export: its clients get what they have asked for, then they are disconnected.")
        @Argument(help: "Name of the export.") var name: String
        @OptionGroup var server: ControlArguments

        func run() throws {
            var request = ControlRequest(command: "remove")
            request.name = name
            _ = try server.send(request)
        }
    }
}

struct ClientsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "clients", abstract: "List and disconnect the clients of a running server.",
        subcommands: [List.self, Disconnect.self], defaultSubcommand: List.self)

    struct List: ParsableCommand {
        static let configuration = CommandConfiguration(abstract: "List the clients.")
        @OptionGroup var server: ControlArguments
        @OptionGroup var report: ReportArguments

        func run() throws {
            let clients = try server.send(ControlRequest(command: "clients")).clients ?? []
            if report.json { return try printJSON(clients) }
            for client in clients {
                let export = client.export.map { "export \"\($0)\"" } ?? "handshake"
                print(
                    "\(client.id) \(client.peer) \(export) "
                        + "\(client.bytesRead) bytes read, \(client.bytesWritten) written, \(client.errors) errors, "
                        + "\(client.inFlight) in flight"
                        + (client.oldestRequestSeconds.map { ", the oldest for \(Int($0)) s" } ?? ""))
            }
        }
    }

    struct Disconnect: ParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Disconnect a client after it got what it has asked for.")
        @Argument(help: "The client's id, from the list.") var client: Int
        @OptionGroup var server: ControlArguments

        func run() throws {
            var request = ControlRequest(command: "disconnect")
            request.client = client
            _ = try server.send(request)
        }
    }
}
