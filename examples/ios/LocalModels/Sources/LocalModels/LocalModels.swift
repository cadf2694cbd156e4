import Foundation

/// The models of an app's bundle: what `mlc_compile package` wrote into dist/bundle.
public struct LocalModel: Decodable {
    public let id: String
    /// What a runtime is asked for, as `system://lib`.
    public let lib: String
    /// Folder in the bundle, or nil where the weights are fetched from `url`.
    public let path: String?
    public let url: String?
    /// What the planner computed: weights, cache, workspace and reserve.
    public let bytes: Int

    enum CodingKeys: String, CodingKey {
        case id = "model_id"
        case lib = "model_lib"
        case path = "model_path"
        case url = "model_url"
        case bytes = "estimated_vram_bytes"
    }

    private struct AppConfig: Decodable {
        let model_list: [LocalModel]
    }

    /// Reads mlc-app-config.json of the folder `bundle`, which is in the app as a folder reference.
    public static func all(in bundle: URL) throws -> [LocalModel] {
        let data = try Data(contentsOf: bundle.appendingPathComponent("mlc-app-config.json"))
        return try JSONDecoder().decode(AppConfig.self, from: data).model_list
    }

    #if os(iOS)
    /// Whether iOS would let this app take the model's memory now.
    public var fits: Bool { os_proc_available_memory() > bytes }
    #endif
}
